"""One device's engine, and the worker class that Ray Data or Serve puts on it. Imports no Ray."""
