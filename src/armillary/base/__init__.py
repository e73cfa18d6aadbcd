"""What every room shares and nothing above it: settings, registries, errors, safe files."""
