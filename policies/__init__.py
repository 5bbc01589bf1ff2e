"""Policies: which of the eligible backends is preferred, as data with its evidence."""

if __name__ != "attnrt.policies":
    raise ImportError("import attnrt.policies, not policies")
