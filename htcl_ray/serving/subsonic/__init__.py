"""The OpenSubsonic API for music players."""
