"""What the project's numbers were measured with; nothing here is a test."""
