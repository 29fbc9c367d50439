// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.noise

private const val LN2_HIGH = 6.9313812256e-01f
private const val LN2_LOW = 9.0580006145e-06f

/** Coefficients of (log(1 + s) - log(1 - s)) / s - 2 in s^2, fitted for float32 (FreeBSD msun, as glibc has them). */
private val SERIES = floatArrayOf(
    6.6666668653e-01f, 4.0000000596e-01f, 2.8571429849e-01f, 2.2222198546e-01f,
    1.8183572590e-01f, 1.5313838422e-01f, 1.4798198640e-01f,
)

/**
 * log(1 + x) in float32 for x in (-1, 0], with the roundings of glibc 2.40 and before.
 *
 * 1 + x is 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2); what rounding 1 + x lost is made good to first order.
 */
internal fun log1p(x: Float): Float {
    if (x > -1.8626451e-09f) return if (x > -5.5511151e-17f) x else x - x * x * 0.5f
    var k = 0
    var f = x
    var lost = 0f
    if (x < -0.29289338f) {
        val sum = 1f + x
        val bits = sum.toRawBits()
        val fraction = bits and 0x007FFFFF
        k = (bits ushr 23) - 127
        lost = (x - (sum - 1f)) / sum
        val upper = fraction >= SQRT2_FRACTION
        if (upper) k += 1
        f = Float.fromBits(fraction or if (upper) 0x3F000000 else 0x3F800000) - 1f
    }
    if (f == 0f) return k * LN2_HIGH + (lost + k * LN2_LOW)
    val half = 0.5f * f * f
    val s = f / (2f + f)
    val z = s * s
    var series = 0f
    for (coefficient in SERIES.reversedArray()) series = z * (coefficient + series)
    if (k == 0) return f - (half - s * (half + series))
    return k * LN2_HIGH - ((half - (s * (half + series) + (k * LN2_LOW + lost))) - f)
}

/** The fraction's bits from which 1 + f is taken as half of it, twice. */
private const val SQRT2_FRACTION = 0x3504F7
