"""The classes that a person subclasses, and the objects that hooks receive."""
