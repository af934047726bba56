"""What attention modules, decoder layers and families of models look like: types of data, which hold no arithmetic."""
