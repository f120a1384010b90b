"""Prompts made of named columns: which there are, and in which order they share most."""
