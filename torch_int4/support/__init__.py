"""Import hooks, atomic files and mixins: nothing here knows a model or a weight."""
