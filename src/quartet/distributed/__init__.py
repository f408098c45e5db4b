"""Several processes that train one model, and what waits in main memory."""
