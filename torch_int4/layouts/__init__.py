"""Shapes of attention modules, decoder layers and families of models: types of data, which hold no arithmetic."""
