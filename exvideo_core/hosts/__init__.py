"""Programs that run the method: each module here is the only one that knows its host."""
