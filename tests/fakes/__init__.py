"""Stand-ins for systems that tests cannot start for real. Each says in a README.md what it pretends."""
