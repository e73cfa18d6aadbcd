"""The server under load, faults and hostility: a client, a process to try it on, and one module for each part."""
