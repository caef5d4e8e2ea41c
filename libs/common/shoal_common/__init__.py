"""Code that Shoal's services share. Importing it reads neither the environment nor the disk."""

VERSION = "0.1.0"
