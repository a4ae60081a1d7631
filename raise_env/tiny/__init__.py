"""The embedded task: skills, the instructions made of them, and the base model that has read of them."""
