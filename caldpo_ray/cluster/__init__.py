"""Ray: joining a cluster, room on it, the policy workers there, and how fast they are."""
