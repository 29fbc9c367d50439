// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.text

/** What a code point is to CLIP's pattern. */
internal enum class Kind { SPACE, LETTER, NUMBER, OTHER }

internal fun kindOf(point: Int): Kind = when (Character.getType(point).toByte()) {
    Character.UPPERCASE_LETTER, Character.LOWERCASE_LETTER, Character.TITLECASE_LETTER, Character.MODIFIER_LETTER,
    Character.OTHER_LETTER -> Kind.LETTER
    Character.DECIMAL_DIGIT_NUMBER, Character.LETTER_NUMBER, Character.OTHER_NUMBER -> Kind.NUMBER
    else -> if (isSpace(point)) Kind.SPACE else Kind.OTHER
}

/** Unicode's White_Space. */
internal fun isSpace(point: Int): Boolean = when (point) {
    in 0x09..0x0D, 0x20, 0x85, 0xA0, 0x1680, in 0x2000..0x200A, 0x2028, 0x2029, 0x202F, 0x205F, 0x3000 -> true
    else -> false
}

/** A text as code points, each with the place in the text before that it comes from. */
internal class Located(val points: IntArray, val origins: IntArray) {
    val size get() = points.size

    fun part(from: Int, to: Int) = Located(points.copyOfRange(from, to), origins.copyOfRange(from, to))

    override fun toString() = String(points, 0, points.size)

    companion object {
        /** Places are those of code points. A lone half of a surrogate pair is no character: it becomes U+FFFD. */
        fun of(text: String): Located {
            val points = text.codePoints().toArray()
            for (index in points.indices) if (points[index] in 0xD800..0xDFFF) points[index] = 0xFFFD
            return Located(points, IntArray(points.size) { it })
        }
    }
}

/** Every run of spaces as one. */
internal fun withSingleSpaces(text: Located): Located {
    val kept = text.points.indices.filter { it == 0 || !isSpace(text.points[it]) || !isSpace(text.points[it - 1]) }
    val points = IntArray(kept.size) { text.points[kept[it]].let { point -> if (isSpace(point)) ' '.code else point } }
    return Located(points, IntArray(kept.size) { text.origins[kept[it]] })
}

/** Code points in lower case each by itself, as Unicode's table has it: only U+0130 becomes two. */
internal fun inLowerCase(text: Located): Located {
    val points = ArrayList<Int>(text.size)
    val origins = ArrayList<Int>(text.size)
    for ((point, origin) in text.points.zip(text.origins)) {
        points += if (point == 0x130) 'i'.code else Character.toLowerCase(point)
        origins += origin
        if (point == 0x130) {
            points += 0x307
            origins += origin
        }
    }
    return Located(points.toIntArray(), origins.toIntArray())
}

/** Byte-level BPE's letter for each byte: printable ones stand for themselves, the others follow from U+0100 on. */
internal val BYTE_LETTERS: CharArray = CharArray(256).also { letters ->
    var next = 0x100
    for (byte in 0..255) {
        val printable = byte in 0x21..0x7E || byte in 0xA1..0xAC || byte in 0xAE..0xFF
        letters[byte] = if (printable) byte.toChar() else (next++).toChar()
    }
}
