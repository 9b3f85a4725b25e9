"""What mmdet needs beside its own classes."""
