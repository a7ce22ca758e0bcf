"""The contract of workers and service: specs, events, files of a job. Loads no torch. Start at `spec/`."""
