"""Load test of a server with users: invalid requests among valid ones, and a killed worker."""
