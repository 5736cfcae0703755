"""What is written and sent: parameters by path, arrays and states as JSON, messages."""
