"""Dense float64 references and small models for the tests. Nothing here uses the library's own taps or algebra."""
