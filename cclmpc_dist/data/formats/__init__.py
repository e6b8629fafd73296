"""Files as they come -> Cases: one file a family of formats. Nothing is imported before a file needs it."""
