// The browser's storage, which can be full or forbidden: what it does not take is kept as long as the page is open.

class Store {
  constructor(open) {
    this.refused = new Map();
    try {
      this.storage = open();
    } catch {
      this.storage = null; // forbidden
    }
  }

  get(key) {
    return this.refused.get(key) ?? this.storage?.getItem(key) ?? null;
  }

  /** Keep `value`; false if it goes with the page. */
  set(key, value) {
    try {
      this.storage.setItem(key, value);
      this.refused.delete(key);
      return true;
    } catch {
      this.refused.set(key, value);
      return false;
    }
  }

  remove(key) {
    this.refused.delete(key);
    this.storage?.removeItem(key);
  }

  keys() {
    const kept = Array.from({ length: this.storage?.length ?? 0 }, (_, i) => this.storage.key(i));
    return [...new Set([...kept, ...this.refused.keys()])];
  }
}

/** On this device, for all tabs. */
export const device = new Store(() => localStorage);

/** For this tab. */
export const tab = new Store(() => sessionStorage);
