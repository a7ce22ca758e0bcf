"""Thin routes of the REST API, one file per resource: parse, call one function, map the result."""
