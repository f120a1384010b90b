"""The price before the run: what a job will read, take and cost, and what that is known from."""
