"""What happens when something goes wrong: kills, notices, bad numbers, full memory, waits without an end."""
