// SPDX-License-Identifier: Apache-2.0
package turbopocket.core

/** Something that is not done, and why, in one sentence for a user: a damaged artifact, an unproven one, a wish. */
class Refused(message: String, cause: Throwable? = null) : Exception(message, cause)

/** The user stopped it; nothing that was opened is open any more. */
class Cancelled : Exception("cancelled")

internal fun refuse(message: String): Nothing = throw Refused(message)
