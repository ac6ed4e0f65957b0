"""How ranks act together: process group, collectives, control, recovery."""
