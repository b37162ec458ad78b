"""A server of many users under load: wrong requests among right ones, and a worker that is killed."""
