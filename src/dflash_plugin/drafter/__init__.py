"""The drafter: configuration, modules, masks, and the interfaces an engine fills."""
