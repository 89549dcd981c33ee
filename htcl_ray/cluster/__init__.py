"""The connection to Ray, the capacity of a cluster, and the private APIs of Ray that this package uses."""
