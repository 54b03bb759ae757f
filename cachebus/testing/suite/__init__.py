"""The tests of `cachebus.testing.stores.StoreConformance`, a module for each part of the store's port."""
