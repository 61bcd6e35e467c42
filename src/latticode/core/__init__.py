"""The ground: structs, the registry, saving and loading, files, ranks, and what three packages or more share."""
