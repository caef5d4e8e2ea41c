"""Pure: what a model needs, what nodes have, and the layouts that follow."""
