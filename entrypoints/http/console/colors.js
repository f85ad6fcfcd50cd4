// A color for each adapter content, the same for as long as the page is open.

const GOLDEN_ANGLE = 137.508;
const FIRST_HUE = 290; // of 250 degrees; the blues between them belong to the KV cache
const HUES = 250;
const known = new Map();

// Returns a CSS color for a content hash; contents seen one after the other differ the most.
export function adapterColor(contentHash) {
  if (!known.has(contentHash)) {
    const hue = (FIRST_HUE + ((known.size * GOLDEN_ANGLE + 100) % HUES)) % 360;
    const lightness = 0.66 + 0.06 * (known.size % 3);
    known.set(contentHash, `oklch(${lightness.toFixed(2)} 0.15 ${hue.toFixed(1)})`);
  }
  return known.get(contentHash);
}
