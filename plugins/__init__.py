"""GPLQ for mmengine: hooks, detection and fine-grained classification, installed as `gplq.plugins`."""
