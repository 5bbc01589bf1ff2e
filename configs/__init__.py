"""Data that ships with attnrt: policies, advisories, model shapes. Read through `importlib.resources`."""
