"""The backends: each folder or file here adapts one family of kernels to one interface, `base.Backend`."""

if __name__ != "attnrt.backends":
    raise ImportError("import attnrt.backends, not backends: a second copy would have a registry of its own")
