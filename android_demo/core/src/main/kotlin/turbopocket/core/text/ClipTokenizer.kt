// SPDX-License-Identifier: Apache-2.0
package turbopocket.core.text

import turbopocket.core.refuse
import java.io.File
import java.text.Normalizer.Form

/** [ids], padded; [mask], 1 for a token and 0 for padding; [cut], the end of the text that found no room. */
class Tokens(val ids: IntArray, val mask: IntArray, val cut: String?)

/**
 * CLIP's byte-level BPE (Radford et al. 2021) by the rules of a `tokenizer.json`: text to exactly [length] ids.
 *
 * Ids are those of the `tokenizers` library. Letters, digits and lower case are the platform's Unicode tables: a
 * character that it does not know yet counts as a sign. [replacements] are tokens that stand for several vectors, each
 * with the text that names all of them.
 */
class ClipTokenizer(file: File, private val length: Int, private val replacements: Map<String, String> = emptyMap()) {
    private val rules = readRules(file)
    private val words = WordSplitter
    private val bpe = Bpe(rules)

    private class Token(val id: Int, val origin: Int)

    /** The ids of [text] between start and end mark; a text too long loses its end, never the end mark. */
    fun encode(text: String): Tokens {
        val composed = composed(replaced(text))
        val found = tokens(composed)
        val ids = IntArray(length) { rules.padding }
        val kept = minOf(found.size, length - 2)
        ids[0] = rules.start
        for (index in 0 until kept) ids[index + 1] = found[index].id
        ids[kept + 1] = rules.end
        val mask = IntArray(length) { if (it < kept + 2) 1 else 0 }
        val cut = found.getOrNull(kept)?.let { composed.part(it.origin, composed.size).toString() }
        return Tokens(ids, mask, cut)
    }

    /** Text with composed characters, where the rules have that first; places of tokens are places in it. */
    private fun composed(text: String): Located {
        if (rules.normalizers.firstOrNull() != Normalizer.NFC) return Located.of(text)
        val pieces = split(Located.of(text), rules.added.filterNot { it.normalized })
        return Located.of(
            pieces.joinToString("") { (piece, added) ->
                if (added != null) added.content else java.text.Normalizer.normalize(piece.toString(), Form.NFC)
            },
        )
    }

    private fun tokens(text: Located): List<Token> {
        val found = ArrayList<Token>()
        for ((piece, added) in split(text, rules.added.filterNot { it.normalized })) {
            if (added != null) {
                found += Token(added.id, piece.origins[0])
                continue
            }
            for ((part, inside) in split(normalized(piece), rules.added.filter { it.normalized })) {
                if (inside != null) found += Token(inside.id, part.origins[0]) else found += wordTokens(part)
            }
        }
        return found
    }

    private fun wordTokens(text: Located): List<Token> = words.split(text).flatMap { word ->
        val letters = StringBuilder()
        val origins = ArrayList<Int>()
        for ((point, origin) in word.points.zip(word.origins)) {
            for (byte in String(Character.toChars(point)).toByteArray()) {
                letters.append(BYTE_LETTERS[byte.toInt() and 0xFF])
                origins += origin
            }
        }
        bpe.encode(letters.toString()).map { (id, at) -> Token(id, origins[at]) }
    }

    private fun normalized(text: Located): Located = rules.normalizers.fold(text) { now, step ->
        when (step) {
            Normalizer.NFC -> now // done in [composed]
            Normalizer.SPACES -> withSingleSpaces(now)
            Normalizer.LOWERCASE -> inLowerCase(now)
        }
    }

    /** The text cut where added tokens are: the first of all, of several at one place the longest. */
    private fun split(text: Located, tokens: List<AddedToken>): List<Pair<Located, AddedToken?>> {
        val known = tokens.map { it to it.content.codePoints().toArray() }.filter { it.second.isNotEmpty() }
        val found = ArrayList<Pair<Located, AddedToken?>>()
        var begin = 0
        var at = 0
        while (at < text.size) {
            val here = known.filter { text.hasAt(at, it.second) }.maxByOrNull { it.second.size }
            if (here == null) {
                at += 1
                continue
            }
            if (at > begin) found += text.part(begin, at) to null
            found += text.part(at, at + here.second.size) to here.first
            at += here.second.size
            begin = at
        }
        if (begin < text.size) found += text.part(begin, text.size) to null
        return found
    }

    private fun Located.hasAt(at: Int, wanted: IntArray) =
        at + wanted.size <= size && wanted.indices.all { points[at + it] == wanted[it] }

    /** The text with every vector of a token named that it holds; Refused where the order would matter. */
    private fun replaced(text: String): String {
        if (replacements.isEmpty()) return text
        val names = rules.added.associate { it.id to it.content } + rules.ids.entries.associate { it.value to it.key }
        val there = tokens(composed(text)).mapNotNullTo(HashSet()) { names[it.id] }
        val held = there.filter { it in replacements }.sorted()
        val overlap = held.any { a -> held.any { b -> a != b && a in replacements.getValue(b) } }
        val put = { order: List<String> -> order.fold(text) { now, it -> now.replace(it, replacements.getValue(it)) } }
        val first = put(held)
        if (overlap || first != put(held.reversed())) {
            refuse("the prompt holds ${held.joinToString(" and ")}, which stand for several vectors and overlap")
        }
        return first
    }
}

/** CLIP's pattern, then GPT-2's, which byte-level BPE asks once more; of the two only the marks are cut further. */
internal object WordSplitter {
    private val marks = listOf("<|startoftext|>", "<|endoftext|>").map { it.codePoints().toArray() }
    private val endings = listOf("'s", "'t", "'re", "'ve", "'m", "'ll", "'d").map { it.codePoints().toArray() }

    fun split(text: Located): List<Located> {
        val found = ArrayList<Located>()
        var at = 0
        while (at < text.size) {
            val mark = marks.find { text.beginsAt(at, it) }
            val to = if (mark != null) at + mark.size else wordEnd(text, at)
            when {
                mark != null -> found += markParts(text.part(at, to))
                kindOf(text.points[at]) != Kind.SPACE -> found += text.part(at, to)
            }
            at = to
        }
        return found
    }

    private fun wordEnd(text: Located, at: Int): Int {
        endings.find { text.beginsAt(at, it) }?.let { return at + it.size }
        val kind = kindOf(text.points[at])
        var to = at + 1
        if (kind != Kind.NUMBER) while (to < text.size && kindOf(text.points[to]) == kind) to += 1
        return to
    }

    private fun markParts(mark: Located): List<Located> {
        val name = mark.size - 2
        return listOf(mark.part(0, 2), mark.part(2, name), mark.part(name, mark.size))
    }

    private fun Located.beginsAt(at: Int, wanted: IntArray) =
        at + wanted.size <= size && wanted.indices.all { points[at + it] == wanted[it] }
}

/** Byte-pair encoding (Sennrich et al. 2016): of all neighbours the pair of lowest rank is joined, the left first. */
internal class Bpe(private val rules: Rules) {
    /** Pairs of an id and where in the word its token begins. */
    fun encode(word: String): List<Pair<Int, Int>> {
        val parts = ArrayList<String>(word.length)
        for (index in word.indices) parts += word[index].toString() + if (index == word.lastIndex) rules.wordEnd else ""
        for (index in parts.indices) if (parts[index] !in rules.ids) parts[index] = rules.unknown
        val places = word.indices.toMutableList()
        while (parts.size > 1) {
            val best = (0 until parts.size - 1).minByOrNull { rank(parts[it], parts[it + 1]) } ?: break
            if (rank(parts[best], parts[best + 1]) == Int.MAX_VALUE) break
            parts[best] = parts[best] + parts.removeAt(best + 1)
            places.removeAt(best + 1)
        }
        return parts.indices.map { index ->
            val id = rules.ids[parts[index]] ?: refuse("'${parts[index]}' is merged and has no id")
            id to places[index]
        }
    }

    private fun rank(left: String, right: String): Int = rules.ranks[left to right] ?: Int.MAX_VALUE
}
