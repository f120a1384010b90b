"""The demo: synthetic support tickets, the model that reads them, and the script that trained it."""
