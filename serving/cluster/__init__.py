"""The gateway and the model app as processes of a cluster, and how they reach each other."""
