"""One fusion a file; every module here is imported and its registered patterns are tried in name order."""
