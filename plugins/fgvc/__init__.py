"""Fine-grained classification on mmengine."""
