// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.noise

/** One number of 128 bits, without a sign. */
private class UInt128(val high: Long, val low: Long) {
    operator fun plus(other: UInt128): UInt128 {
        val sum = low + other.low
        val carry = if (java.lang.Long.compareUnsigned(sum, low) < 0) 1 else 0
        return UInt128(high + other.high + carry, sum)
    }

    operator fun times(other: UInt128): UInt128 =
        UInt128(high * other.low + low * other.high + highProduct(low, other.low), low * other.low)
}

/** The upper 64 bits of a product of two numbers without signs, from four products of 32 bits. */
private fun highProduct(a: Long, b: Long): Long {
    val mask = 0xFFFFFFFFL
    val (aLow, aHigh) = (a and mask) to (a ushr 32)
    val (bLow, bHigh) = (b and mask) to (b ushr 32)
    val middle = aHigh * bLow + ((aLow * bLow) ushr 32)
    val crossed = (middle and mask) + aLow * bHigh
    return aHigh * bHigh + (middle ushr 32) + (crossed ushr 32)
}

/**
 * The generator behind numpy's `default_rng(seed)`: PCG XSL RR 128/64 (O'Neill 2014, HMC-CS-2014-0905, section 6.3.4),
 * seeded by numpy's SeedSequence. Numbers of 32 bits are the halves of those of 64, the lower first.
 */
class Pcg64(seed: Long) {
    private var state: UInt128
    private val increment: UInt128
    private var waiting: Int? = null

    init {
        require(seed >= 0) { "seed $seed is below 0" }
        val (stateHigh, stateLow, streamHigh, streamLow) = seedWords(seed)
        increment = UInt128((streamHigh shl 1) or (streamLow ushr 63), (streamLow shl 1) or 1)
        state = (increment + UInt128(stateHigh, stateLow)) * MULTIPLIER + increment
    }

    /** The next 64 bits. */
    fun nextLong(): Long {
        state = state * MULTIPLIER + increment
        return java.lang.Long.rotateRight(state.high xor state.low, (state.high ushr 58).toInt())
    }

    /** The next 32 bits. */
    fun nextInt(): Int {
        waiting?.let {
            waiting = null
            return it
        }
        val both = nextLong()
        waiting = (both ushr 32).toInt()
        return both.toInt()
    }

    /** A multiple of 2^-24 in [0, 1). */
    fun nextFloat(): Float = (nextInt() ushr 8) * (1f / 16_777_216f)

    private companion object {
        val MULTIPLIER = UInt128(0x2360ED051FC65DA4, 0x4385DF649FCCF645)
    }
}

private const val POOL = 4

/**
 * Four words of 64 bits of numpy's SeedSequence (after O'Neill's `seed_seq_fe`, 2015): the seed's words of 32 bits are
 * hashed into a pool in which each changes all others, and hashed once more on the way out.
 */
private fun seedWords(seed: Long): LongArray {
    var constant = 0x43B0D7E5
    fun hashed(word: Int): Int {
        var value = word xor constant
        constant *= 0x931E8875.toInt()
        value *= constant
        return value xor (value ushr 16)
    }
    val pool = IntArray(POOL) { hashed(if (it < 2) (seed ushr (32 * it)).toInt() else 0) }
    for (from in 0 until POOL) {
        for (to in 0 until POOL) {
            if (from == to) continue
            val mixed = 0xCA01F9DD.toInt() * pool[to] - 0x4973F715 * hashed(pool[from])
            pool[to] = mixed xor (mixed ushr 16)
        }
    }
    constant = 0x8B51F9DD.toInt()
    val words = IntArray(2 * POOL) {
        var value = pool[it % POOL] xor constant
        constant *= 0x58F38DED
        value *= constant
        value xor (value ushr 16)
    }
    return LongArray(POOL) { (words[2 * it].toLong() and 0xFFFFFFFFL) or (words[2 * it + 1].toLong() shl 32) }
}
