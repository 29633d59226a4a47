"""The durable record of every generation, and who draws it next."""
