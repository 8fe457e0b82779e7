"""Minutes of mixed load: no error, no leak, no drift."""
