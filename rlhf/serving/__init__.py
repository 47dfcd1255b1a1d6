"""The reward pool over HTTP: what is asked and answered, and the application. `actors/server.py` is what scores."""
