"""What a trained agent and its world model are worth."""
