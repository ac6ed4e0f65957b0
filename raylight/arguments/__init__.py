"""From what a person wrote to a Config."""
