"""Problems of the exact natural gradients, for tests and measurements alike. Start at `problems`."""
