"""The drafter: configuration, modules, masks, and the interfaces that an engine implements."""
