"""What `trace demo` shows: a corpus of invented facts, a model that knows them, and how well they are traced back."""
