// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.noise

import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.sqrt

/**
 * Standard normal float32 numbers, those of `numpy.random.default_rng(seed).standard_normal(shape, float32)`, to the
 * bit.
 *
 * The ziggurat of Marsaglia and Tsang (2000, Journal of Statistical Software 5(8)) with 256 layers of equal area: 8
 * bits choose a layer, one the sign, 23 the place in it. In the tail, a number of 4,000, numpy asks the system's log1p
 * for float32: [log1p] is glibc's up to 2.40, of which other systems' differ in the last digit now and then.
 */
class StandardNormal(seed: Long) {
    private val bits = Pcg64(seed)

    /** The next [count] numbers. */
    fun next(count: Int): FloatArray = FloatArray(count) { next() }

    private fun next(): Float {
        while (true) {
            val word = bits.nextInt()
            val layer = word and 0xFF
            val place = word ushr 9
            val distance = place * WIDTHS[layer]
            val x = if (word and 0x100 != 0) -distance else distance
            if (place < INSIDE[layer]) return x
            if (layer == 0) return tail(place and 0x100 != 0)
            val height = (HEIGHTS[layer - 1] - HEIGHTS[layer]) * bits.nextFloat() + HEIGHTS[layer]
            if (height < exp(-0.5 * x * x)) return x
        }
    }

    /** A number beyond the last layer (Marsaglia 1964): exponential ones, until one is under the curve. */
    private fun tail(negative: Boolean): Float {
        while (true) {
            val beyond = -TAIL_INVERSE * log1p(-bits.nextFloat())
            val other = -log1p(-bits.nextFloat())
            if (other + other > beyond * beyond) return if (negative) -(TAIL + beyond) else TAIL + beyond
        }
    }

    private companion object {
        /** Where the last layer ends and the tail begins. */
        const val START = 3.654152885361009
        const val TAIL = START.toFloat()
        const val TAIL_INVERSE = (1 / START).toFloat()

        /** Area of each layer under exp(-x^2 / 2), that of the first with the tail. */
        const val AREA = 0.004928673233974658

        fun curve(x: Double) = exp(-0.5 * x * x)

        /** Right ends of the layers: that of the first, a rectangle of the same area, then from the top down. */
        val ENDS = DoubleArray(257).also { ends ->
            ends[256] = AREA / curve(START)
            ends[255] = START
            for (layer in 254 downTo 1) ends[layer] = sqrt(-2 * ln(AREA / ends[layer + 1] + curve(ends[layer + 1])))
        }

        const val PLACES = 8_388_608.0
        val WIDTHS = FloatArray(256) { ((if (it == 0) ENDS[256] else ENDS[it]) / PLACES).toFloat() }
        val HEIGHTS = FloatArray(256) { curve(ENDS[it]).toFloat() }

        /** Places below which a layer lies under the curve over its whole height. */
        val INSIDE = IntArray(256) {
            val share = if (it == 0) START / ENDS[256] else ENDS[it - 1] / ENDS[it]
            Math.round(share * PLACES).toInt()
        }
    }
}
